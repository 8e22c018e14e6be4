"""Text from a trained model: prompts, the decoding loop, sampling and streamed text."""
