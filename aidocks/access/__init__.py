"""Who may do what through the service's door: API keys, what they allow, and the record of what was done."""
