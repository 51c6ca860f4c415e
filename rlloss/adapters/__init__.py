"""Other systems' interfaces, spoken in their words over this library's losses and loop."""
