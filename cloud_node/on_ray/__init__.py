"""The engine that runs on Ray: stages in processes of their own, replicas, and what happens when one dies."""
