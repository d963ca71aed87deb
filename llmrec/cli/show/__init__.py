"""What commands print: estimates, prompts, differences."""
