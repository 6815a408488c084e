"""What people look at after a run: the contact sheet and the HTML report, made from the ledger."""
