"""From a request to utterances to batches on replicas, and the audio back in order."""
