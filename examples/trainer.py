"""`transformers.Trainer` on a model whose middle is elsewhere, with gradient accumulation and checkpointing.

Run it against a node on this machine:  python examples/trainer.py localhost:7070 adapter [certs/alice]
"""

import sys

import peft
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import edge_client

address, out, *certs = sys.argv[1:]
texts = [f"Patient {number} was seen on ward {number % 3} and is well." for number in range(32)]

model = edge_client.connect(address, certs=certs[0] if certs else None)
tokenizer = model.edge.tokenizer
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
targets = edge_client.modules(model, "q_proj", "v_proj")
tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))

arguments = TrainingArguments(
    output_dir=out,
    max_steps=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    learning_rate=1e-3,
    logging_steps=1,
    report_to=[],
)
trainer = Trainer(
    model=tuned,
    args=arguments,
    train_dataset=[dict(tokenizer(text)) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
tuned.save_pretrained(out)
