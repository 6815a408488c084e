"""Input tables: readers of Parquet, CSV and JSON lines, the scan that decides what is rendered, batches of one shape,
and the images that rows name. Rows after the pipeline belong to `ledger`.
"""
