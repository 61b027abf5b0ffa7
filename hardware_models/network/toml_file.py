"""The reader of `hardware_models.toml_file` under its former name, for modules that still import it from here."""

from hardware_models.toml_file import Count, Name, NonNegative, Positive, Section, read_section

__all__ = ["Count", "Name", "NonNegative", "Positive", "Section", "read_section"]
