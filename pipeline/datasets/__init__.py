"""Datasets: prompts from recipes, benchmark suites, and exports of rendered videos."""
