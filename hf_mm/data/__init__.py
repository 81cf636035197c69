"""Pictures with texts: the bundled emoji, and whatever a user brings."""
