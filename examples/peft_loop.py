"""LoRA on the ends with `peft` and a plain PyTorch loop, then text from the tuned model.

Run it against a node on this machine:  python examples/peft_loop.py localhost:7070 adapter [certs/alice]
"""

import sys

import peft
import torch

import edge_client

address, out, *certs = sys.argv[1:]
rows = [
    "The nurse wrote: stable overnight.",
    "The nurse wrote: moved to ward two.",
    "The nurse wrote: ready to go home.",
]

model = edge_client.connect(address, certs=certs[0] if certs else None)
tokenizer = model.edge.tokenizer
targets = edge_client.modules(model, "q_proj", "v_proj")
tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
optimizer = torch.optim.AdamW([value for value in tuned.parameters() if value.requires_grad], lr=1e-3)

batch = tokenizer(rows, return_tensors="pt", padding=True)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
for step in range(5):
    loss = tuned(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

prompt = tokenizer("The nurse wrote:", return_tensors="pt")
print(tokenizer.decode(tuned.generate(**prompt, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True))
tuned.save_pretrained(out)
