"""What other tools answer for the measured rows, asked of the tools themselves, without a network.

`python -m probes.others results/records --out results/tables/other-tools.csv` runs wherever some of
them are installed (`pip install --no-deps fitcheck-llm canifinetune hf-mem llm-analysis accelerate`
beside vramwise); the planner needs none of them and reads the table alone.
"""
