"""Recipes: whole trainings, each a config and a thin main. Import the one you want."""

__all__: list[str] = []
