"""The attention kinds of the decoder, a file each (`docs/attention-kinds.md`)."""
