"""Datasets that trainers read: one small file for each target format, a card, and a provenance that can be checked."""
