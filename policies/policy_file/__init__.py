"""The policy file: its contents, a strict reader that names lines, and a writer."""
