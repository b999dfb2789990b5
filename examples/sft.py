"""TRL's `SFTTrainer` on a model whose middle is elsewhere (pip install 'isthmus[edge,sft]').

Run it against a node on this machine:  python examples/sft.py localhost:7070 adapter [certs/alice]
"""

import sys

import peft
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import edge_client

address, out, *certs = sys.argv[1:]
rows = [{"prompt": f"Ward {number % 3}:", "completion": f" patient {number} is well."} for number in range(32)]

model = edge_client.connect(address, certs=certs[0] if certs else None)
tokenizer = model.edge.tokenizer
targets = edge_client.modules(model, "q_proj", "v_proj")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        report_to=[],
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets),
)
trainer.train()
trainer.model.save_pretrained(out)
