"""From a payload to an answer, whatever carried it: dialects, references, codec, store."""
