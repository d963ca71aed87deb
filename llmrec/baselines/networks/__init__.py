"""What networks share: how long they learn, and what goes to another domain."""
