"""The op dialect: op records, providers, costs, devices, graph verifier and printer. Imports torch only."""
