"""What makes and compares several runs; nothing else imports it."""
