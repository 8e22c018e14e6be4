"""Words to make keys, values and sentences of; plain lists, so that a seed means the same text everywhere."""

import random
from collections.abc import Callable
from uuid import UUID


def _listed(text: str, separator: str = " ") -> list[str]:
    return text.replace("\n", " ").strip().split(separator)


ADJECTIVES = _listed("""
able amber ancient arctic autumn awake azure bitter blank bold brave brief bright brisk broad bronze calm careful
cheerful chilly civic clear clever cloudy coastal cold copper cosy crimson crisp curious damp dapper daring dark deep
distant double dusty eager early eastern easy elder electric empty famous fancy fast fearless fierce final flat fluent
foggy formal fragile frank fresh frozen gentle gifted giant glad golden grand grave green grey hardy harsh hasty hidden
hollow honest humble hungry idle inner ivory jolly keen kind large late lavish lazy light little lively local lofty
lonely long loud loyal lucky lunar major marble mellow merry mild minor misty modern modest narrow neat nimble noble
northern novel odd olive open orange outer pale patient plain polite proud purple quick quiet rapid rare ready red
regal remote rich rough round royal ruby rural rusty scarlet secret serene shady sharp shiny short silent silver
simple sleepy slender slow small smart smooth snowy soft solar solid southern spare steady steep stern still strange
strict strong sturdy subtle sudden sunny sweet swift tall tame tender thin tidy tiny tough tranquil upper urban useful
vast velvet violet vivid warm wary weary western wide wild windy winter wise wooden worthy young zesty
""")

NOUNS = _listed("""
acorn anchor apple apron arrow attic badge bakery balcony bamboo banjo barn basin basket beacon beaver bell bench
bicycle birch blanket boat bottle bridge broom bucket button cabin cactus camel candle canoe canyon carpet castle
cedar cellar chapel cherry chimney circle clock cloud coat comet compass copper corner cottage cotton crane cricket
crown cup curtain daisy desert dolphin donkey door dragon drum eagle easel echo elm engine falcon farmer feather fence
ferry field finch flame flute forest fountain fox gallery garden gate glacier glove goose grape guitar hammer harbor
harp hat hawk hedge helmet heron hill honey horse hotel igloo island jacket jar jewel kettle kite kitchen ladder lake
lamp lantern leaf lemon letter library lily lion lizard magnet maple market meadow medal melon mill mirror monkey moon
mountain museum napkin needle nest notebook oak oasis ocean olive orchard otter owl oyster paddle painter palace panda
parrot path peach pearl pebble pencil piano pigeon pillow pilot pine planet plough pocket pond poppy porch prairie
pumpkin puzzle quilt rabbit raft raven ribbon river robin rocket roof rope rose saddle sailor salmon sandal scarf
school shadow shell shepherd shield ship shoe shovel signal sparrow spoon spring squirrel stable statue stone stove
stream sunset swan table tailor teapot temple theater thistle ticket tiger tower tractor train trumpet tulip tunnel
turtle umbrella valley vase village violin wagon wall walnut waterfall whale wheat wheel whistle willow window wolf
""")

VERBS = _listed("""
admires answers blames borrows bothers builds calls carries catches chases cheers cleans collects counts covers
describes draws dries examines fears feeds fills finds fixes follows forgets greets guards guides hears helps
hides holds ignores invites joins keeps leaves lifts likes loses marks measures meets mends misses moves names needs
notices opens orders paints passes picks praises pulls pushes reaches reads recalls repairs rests returns rings sees
sells sends shakes shows shuts sketches spots stores studies surprises teaches thanks touches trusts turns visits
wakes warms washes watches weighs welcomes wraps
""")

PLACES = _listed(
    """
after lunch, at noon, before dawn, behind the hill, by the river, during the storm, every morning, in the city, in the
evening, near the harbor, on Sunday, on the square, outside the gate, under the bridge, with great care, without a word
""",
    ", ",
)

_ONSETS = _listed("b br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sl st t th tr v w z")
_VOWELS = _listed("a e i o u ai ea ou")


def compound(draw: random.Random) -> str:
    """An adjective and a noun such as `calm-harbor`: some 60 thousand are possible."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def number(draw: random.Random) -> str:
    """Seven digits, the first not 0."""
    return str(draw.randrange(10**6, 10**7))


def uuid(draw: random.Random) -> str:
    """A UUID of version 4 by its digits."""
    return str(UUID(int=draw.getrandbits(128), version=4))


def made_up(draw: random.Random) -> str:
    """A word of no language such as `slaimoupra`."""
    return "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.randint(2, 4)))


def sentence(draw: random.Random) -> str:
    """A plain sentence about nothing of interest."""
    first, second = draw.sample(NOUNS, 2)
    return (
        f"The {draw.choice(ADJECTIVES)} {first} {draw.choice(VERBS)} the {draw.choice(ADJECTIVES)} {second} "
        f"{draw.choice(PLACES)}."
    )


def distinct(make: Callable[[random.Random], str], draw: random.Random, count: int, taken: set[str]) -> list[str]:
    """So many different words, none of them in `taken`, which they join."""
    found: list[str] = []
    while len(found) < count:
        word = make(draw)
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found
