# Every recipe is one command that can be typed without make. `make help` lists the targets.
# PYTHON=python3 uses an environment of your own instead of .venv; ARGS="..." adds flags to a stage.

PYTHON ?= .venv/bin/python
ARGS ?=
OUT ?= out
# Large tensors in huge pages: fewer page faults, Linux only.
export THP_MEM_ALLOC_ENABLE ?= 1
VENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)

.DEFAULT_GOAL := all
.PHONY: all help install tokenizer pretrain sample classify sft lora rlhf rlhf-all report test test-all test-peers bench clean
# A stage that was interrupted goes on; one that is older than what it starts from is moved aside and made anew.
AGAIN = $(if $(wildcard $@),--fresh,--resume)

all: $(OUT)/report.html ## every stage on the built-in data, offline: about 11 min

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV) ## .venv with requirements.txt: about 1 min

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

tokenizer: $(OUT)/tokenizer/tokenizer.json ## train the byte-pair tokenizer: 10 s
$(OUT)/tokenizer/tokenizer.json: | $(VENV)
	$(PYTHON) tokenizer.py train --out_dir $(OUT)/tokenizer $(AGAIN)

pretrain: $(OUT)/pretrain/summary.json ## pretrain the tiny model: 2 min
$(OUT)/pretrain/summary.json: $(OUT)/tokenizer/tokenizer.json
	$(PYTHON) train.py train --out_dir $(OUT)/pretrain --tokenizer $(OUT)/tokenizer/tokenizer.json $(AGAIN) $(ARGS)

sample: $(OUT)/pretrain/sample.txt ## let the pretrained model write: 5 s
$(OUT)/pretrain/sample.txt: $(OUT)/pretrain/summary.json
	$(PYTHON) gpt.py generate --checkpoint $(OUT)/pretrain/model.safetensors --num_samples 3 --max_new_tokens 80 > $@.tmp
	mv $@.tmp $@ && cat $@

classify: $(OUT)/cls/summary.json ## tell spam from the rest: 1 min
$(OUT)/cls/summary.json: $(OUT)/pretrain/summary.json
	$(PYTHON) finetune_cls.py train --out_dir $(OUT)/cls --init $(OUT)/pretrain/model.safetensors --epochs 2 $(AGAIN) $(ARGS)

sft: $(OUT)/sft/summary.json ## answer instructions: 4 min
$(OUT)/sft/summary.json: $(OUT)/pretrain/summary.json
	$(PYTHON) finetune_sft.py train --out_dir $(OUT)/sft --init $(OUT)/pretrain/model.safetensors $(AGAIN) $(ARGS)

lora: $(OUT)/lora/summary.json ## classify once more, all weights against adapters: 1 min
$(OUT)/lora/summary.json: $(OUT)/pretrain/summary.json
	$(PYTHON) lora.py compare --out_dir $(OUT)/lora $(AGAIN) --flags="--init $(OUT)/pretrain/model.safetensors --epochs 2 $(ARGS)"

rlhf: $(OUT)/ppo/evaluation.json ## reward model, PPO and what it brought: 3 min
$(OUT)/ppo/evaluation.json: $(OUT)/sft/summary.json
	$(PYTHON) rlhf.py all --out_dir $(OUT) --init $(OUT)/sft/model.safetensors $(AGAIN) $(ARGS)

rlhf-all: $(OUT)/dpo/summary.json $(OUT)/grpo/summary.json ## DPO and GRPO too: 3 min
	$(PYTHON) rlhf.py evaluate --checkpoint $(OUT)/ppo/model.safetensors,$(OUT)/dpo/model.safetensors,$(OUT)/grpo/model.safetensors --init $(OUT)/sft/model.safetensors --reward $(OUT)/reward/model.safetensors
$(OUT)/dpo/summary.json $(OUT)/grpo/summary.json: $(OUT)/%/summary.json: $(OUT)/ppo/evaluation.json
	$(PYTHON) rlhf.py $* --out_dir $(OUT)/$* --init $(OUT)/sft/model.safetensors --reward $(OUT)/reward/model.safetensors $(AGAIN) $(ARGS)

report: $(OUT)/report.html ## what every stage did and how well, on one page: 5 s
$(OUT)/report.html: $(OUT)/pretrain/sample.txt $(OUT)/cls/summary.json $(OUT)/lora/summary.json $(OUT)/sft/summary.json $(OUT)/ppo/evaluation.json
	$(PYTHON) train.py evaluate --out_dir $(OUT)/pretrain
	$(PYTHON) train.py report --out_dir $(OUT)

test: $(VENV) ## the quick tests, offline: 2 min
	$(PYTHON) -m pytest -q -m "not slow and not peer and not gpu" $(ARGS)

test-all: $(VENV) ## all tests that need no GPU and no other library: 8 min
	$(PYTHON) -m pytest -q -m "not peer and not gpu" $(ARGS)

test-peers: $(VENV) ## install requirements-peers.txt and compare with those packages: 5 min
	$(PYTHON) -m pip install --quiet -r requirements-peers.txt
	$(PYTHON) -m pytest -q -m peer $(ARGS)

bench: $(VENV) ## time and memory beside other libraries that are installed: 4 min
	$(PYTHON) tests/bench.py lora

clean: ## remove out/ and data/prepared/, keep downloads and .venv: 1 s
	rm -rf $(OUT) data/prepared
