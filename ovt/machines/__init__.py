"""The verbs that only virtual machines have: snapshots, clones, templates, devices, migration."""
