"""Where answers go: printed as they come, or to a file that appears once it is whole."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from nsa_kernels.errors import SettingError

from nsa_lightning.data.storage import whole_file
from nsa_lightning.generation.generate import Piece
from nsa_lightning.generation.prompts import Prompt


@contextmanager
def printed_answers(prompts: Sequence[Prompt], out: TextIO) -> Iterator[Callable[[Piece], None]]:
    """Print answers in the order of their prompts, each under its name if there are several.

    One is printed as it comes; the others wait for it. What waits when Ctrl-C comes is printed too.
    """
    waiting, ended, begun = [""] * len(prompts), [False] * len(prompts), [False] * len(prompts)
    current = 0

    def show(number: int) -> None:
        text, waiting[number] = waiting[number], ""
        out.write(text)

    def add(piece: Piece) -> None:
        nonlocal current
        if not begun[piece.prompt] and len(prompts) > 1:
            waiting[piece.prompt] = f"==> {prompts[piece.prompt].name} <==\n"
        begun[piece.prompt] = True
        waiting[piece.prompt] += piece.text
        ended[piece.prompt] = piece.finish is not None
        while current < len(prompts) and begun[current]:
            show(current)
            if not ended[current]:
                break
            out.write("\n")
            current += 1
        out.flush()

    try:
        yield add
    except KeyboardInterrupt:
        for number in range(current, len(prompts)):
            if begun[number]:
                show(number)
                out.write("\n")
        out.flush()
        raise


@contextmanager
def written_answers(prompts: Sequence[Prompt], path: Path) -> Iterator[Callable[[Piece], None]]:
    """Write one JSON line a prompt, in their order: prompt, answer, its number of tokens and why it ended.

    After Ctrl-C the file has the answers that were finished.

    Raises:
        ValueError: the file exists or cannot be written.
    """
    if path.exists():
        raise SettingError(f"output must not exist, got {path}")
    texts, lines = [""] * len(prompts), [""] * len(prompts)

    def add(piece: Piece) -> None:
        texts[piece.prompt] += piece.text
        if piece.finish is not None:
            prompt, answer = prompts[piece.prompt].text, texts[piece.prompt]
            line = {"prompt": prompt, "answer": answer, "tokens": len(piece.tokens), "finish": piece.finish}
            lines[piece.prompt] = json.dumps(line, ensure_ascii=False) + "\n"

    interrupted = None
    with whole_file(path) as stream:
        try:
            yield add
        except KeyboardInterrupt as error:
            if not any(lines):
                raise
            interrupted = error
        stream.write("".join(lines).encode())
    if interrupted is not None:
        raise interrupted
