"""Texts about users and items that a language model generates once and stores as features."""
