"""A classifier of pictures whose middle is elsewhere: LoRA and a head, trained with `transformers.Trainer`.

Run it against a node that serves a ViT:  python examples/pictures.py localhost:7070 adapter [certs/alice]
"""

import sys

import peft
import torch
from transformers import Trainer, TrainingArguments

import edge_client

address, out, *certs = sys.argv[1:]

model = edge_client.connect(address, labels=3, certs=certs[0] if certs else None)
targets = edge_client.modules(model, "q_proj", "v_proj")
settings = peft.LoraConfig(r=8, target_modules=targets, modules_to_save=edge_client.head(model))
tuned = peft.get_peft_model(model, settings)

# Noise in which one of three colours is strong stands for pictures and their labels.
size = model.config.image_size
pictures = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(0))
rows = []
for number, picture in enumerate(pictures):
    picture[number % 3] += 2
    rows.append({"pixel_values": picture, "labels": number % 3})

arguments = TrainingArguments(
    output_dir=out,
    num_train_epochs=8,
    per_device_train_batch_size=8,
    learning_rate=1e-2,
    logging_steps=6,
    report_to=[],
    remove_unused_columns=False,
)
Trainer(model=tuned, args=arguments, train_dataset=rows).train()
with torch.no_grad():
    found = tuned(pixel_values=pictures).logits.argmax(1)
right = sum(int(one) == row["labels"] for one, row in zip(found, rows, strict=True))
print(f"{right} of {len(rows)} pictures are told by their colour")
tuned.save_pretrained(out)
