"""The ledger: the record of every row, its compaction, and the table of failed rows."""
