"""Commands that measure, and what they share: see README.md."""
