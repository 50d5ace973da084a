"""Pages for the operator's admins: accounts, prices, plans, models and the audit log."""
