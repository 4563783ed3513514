"""An encoder inside a multimodal language model: tiles, projector, language model, greedy decoding."""
