"""`generate` on a model whose middle is elsewhere: greedy, sampled, by beams, batched with padding on the left.

Run it against a node on this machine:  python examples/generate.py localhost:7070 [certs/alice]
"""

import sys

import edge_client

address, *certs = sys.argv[1:]
model = edge_client.connect(address, certs=certs[0] if certs else None)
tokenizer = model.edge.tokenizer
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
prompts = tokenizer(["The film was", "In the end we all thought that it was"], return_tensors="pt", padding=True)

for settings in ({"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}):
    tokens = model.generate(**prompts, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id, **settings)
    print(settings, tokenizer.batch_decode(tokens, skip_special_tokens=True))
