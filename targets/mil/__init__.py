"""An evaluator of saved Core ML ML Programs."""
