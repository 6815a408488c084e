"""The commands of `pyramid-render`, one module each, with `run(settings) -> exit code`. Settings are in
`jobs.settings`.
"""
