"""The decoder, one description per family, name maps to and from Hugging Face."""
