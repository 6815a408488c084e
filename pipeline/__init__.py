"""The rendering farm: tables of prompts in, videos and a ledger out."""
