"""Tokenizers of the kinds that models have, small enough to be read."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors


def word_piece() -> tokenizers.Tokenizer:
    """Drops spaces, makes letters small and knows few words, as BERT's does."""
    pieces = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *map(chr, range(33, 127)),
        *(f"##{chr(code)}" for code in range(97, 110)),
        "été",
    ]
    library = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return library
