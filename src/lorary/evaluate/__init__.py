"""What a routed model is worth: losses, choices among options, generated answers, and how sure we are."""
