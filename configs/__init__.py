"""The options, and configurations as JSON files."""
