"""The tests of ``make test-gpu``.  Under simulation ``tests/test_gpu_cases_sim.py`` runs the same bodies."""
