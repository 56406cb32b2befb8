"""LoRAs that come with a request: added to the weights where they lie, and taken away to the bit."""
