"""Texts on users and items that a language model generates once, stored as features."""
