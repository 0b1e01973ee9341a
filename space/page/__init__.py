"""What people see: form and recipe, plan and merges, and each merge's own page."""
