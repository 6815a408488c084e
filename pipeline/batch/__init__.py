"""The batch job on Ray Data: planner, costs, runner, quarantine, and the loop of a job. The stages that it runs are in
`stages`.
"""
