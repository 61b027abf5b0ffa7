"""Presets: transformer families generated from their configurations, without torch."""
