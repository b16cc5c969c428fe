# Every recipe is one command that can be typed without make. `make help` lists the targets.
# PYTHON=python3 uses an environment of your own instead of .venv; ARGS="..." adds flags to a stage.

PYTHON ?= .venv/bin/python
ARGS ?=
OUT ?= out
# Large tensors in huge pages: fewer page faults, Linux only.
export THP_MEM_ALLOC_ENABLE ?= 1
VENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)

.DEFAULT_GOAL := all
.PHONY: all help install tokenizer pretrain sample classify sft lora rlhf rlhf-all report chat serve tiny methods real shakespeare stories test test-all test-peers test-gpu bench bench-gpu clean
# A stage that was interrupted is resumed; one that is older than what it starts from is moved aside and run again.
AGAIN = $(if $(wildcard $@),--fresh,--resume)

all: $(OUT)/report.html ## every stage on the built-in data, offline: 9.5 min on 2 cores

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV) ## .venv with requirements.txt: about 1 min

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

tokenizer: $(OUT)/tokenizer/tokenizer.json ## train the byte-pair tokenizer: 8 s
$(OUT)/tokenizer/tokenizer.json: | $(VENV)
	$(PYTHON) tokenizer.py train --out_dir $(OUT)/tokenizer $(AGAIN)

pretrain: $(OUT)/pretrain/summary.json ## pretrain the tiny model: 3.5 min
$(OUT)/pretrain/summary.json: $(OUT)/tokenizer/tokenizer.json
	$(PYTHON) train.py train --out_dir $(OUT)/pretrain --tokenizer $(OUT)/tokenizer/tokenizer.json $(AGAIN) $(ARGS)

sample: $(OUT)/pretrain/sample.txt ## text from the pretrained model: 5 s
$(OUT)/pretrain/sample.txt: $(OUT)/pretrain/summary.json
	$(PYTHON) gpt.py generate --checkpoint $(OUT)/pretrain/model.safetensors --num_samples 3 --max_new_tokens 80 > $@.tmp
	mv $@.tmp $@ && cat $@

classify: $(OUT)/cls/summary.json ## classify messages as spam or not: 20 s
$(OUT)/cls/summary.json: $(OUT)/pretrain/summary.json
	$(PYTHON) finetune_cls.py train --out_dir $(OUT)/cls --init $(OUT)/pretrain/model.safetensors --epochs 1 $(AGAIN) $(ARGS)

sft: $(OUT)/sft/summary.json ## answer instructions: 1.5 min
$(OUT)/sft/summary.json: $(OUT)/pretrain/summary.json
	$(PYTHON) finetune_sft.py train --out_dir $(OUT)/sft --init $(OUT)/pretrain/model.safetensors $(AGAIN) $(ARGS)

lora: $(OUT)/lora/summary.json ## classify them with LoRA adapters of rank 8: 0.5 min
$(OUT)/lora/summary.json: $(OUT)/pretrain/summary.json
	$(PYTHON) finetune_cls.py train --out_dir $(OUT)/lora --init $(OUT)/pretrain/model.safetensors --lora_rank 8 --epochs 1 --batch_size 16 $(AGAIN) $(ARGS)

rlhf: $(OUT)/ppo/evaluation.json ## reward model, PPO and an evaluation: 3 min
$(OUT)/ppo/evaluation.json: $(OUT)/sft/summary.json
	$(PYTHON) rlhf.py all --out_dir $(OUT) --init $(OUT)/sft/model.safetensors $(AGAIN) $(ARGS)

rlhf-all: $(OUT)/dpo/summary.json $(OUT)/grpo/summary.json ## DPO and GRPO too, and all three side by side (not run as a target)
	$(PYTHON) rlhf.py evaluate --checkpoint $(OUT)/ppo/model.safetensors,$(OUT)/dpo/model.safetensors,$(OUT)/grpo/model.safetensors --init $(OUT)/sft/model.safetensors --reward $(OUT)/reward/model.safetensors
# The reward model must be there; rlhf-all itself writes evaluation.json anew, which makes neither of the two out of date.
$(OUT)/dpo/summary.json $(OUT)/grpo/summary.json: $(OUT)/%/summary.json: $(OUT)/sft/summary.json | $(OUT)/ppo/evaluation.json
	$(PYTHON) rlhf.py $* --out_dir $(OUT)/$* --init $(OUT)/sft/model.safetensors --reward $(OUT)/reward/model.safetensors $(AGAIN) $(ARGS)

report: $(OUT)/report.html ## every stage's figures, as a table and a page: 5 s
$(OUT)/report.html: $(OUT)/pretrain/sample.txt $(OUT)/cls/summary.json $(OUT)/lora/summary.json $(OUT)/sft/summary.json $(OUT)/ppo/evaluation.json
	$(PYTHON) train.py report --out_dir $(OUT)

chat: | $(VENV) ## talk to the best model in out/, else to the one in assets; trains nothing
	$(PYTHON) finetune_sft.py chat $(ARGS)

serve: | $(VENV) ## the same in the browser, http://127.0.0.1:8000, with OpenAI's chat API
	$(PYTHON) finetune_sft.py serve $(ARGS)

tiny: $(OUT)/ppo/evaluation.json ## assets/tiny.safetensors, the model to talk to before anything is trained: 1 s
	$(PYTHON) -c "import gpt; model, tokenizer, info = gpt.load_checkpoint('$(OUT)/ppo/model.safetensors'); gpt.save_checkpoint('assets/tiny.safetensors', model.bfloat16(), tokenizer, **info)"

methods: $(OUT)/sft/summary.json ## ten ways to learn from preferences, three seeds: 2 hours, computed; goes on where it stopped
	$(PYTHON) tests/methods.py --init $(OUT)/sft/model.safetensors --out_dir $(OUT)/methods $(ARGS)

# The same on real data with OpenAI's weights: downloads 550 MB (SIZE=gpt2-medium: 2 GB) into $DATA_DIR, default data/,
# unless they lie there, and wants a GPU. Published figures stand beside each command; none was seen here.
# SIZE=gpt2-medium is the book's instruction model; JUDGE=ollama (a server with llama3) has its answers graded as well;
# HF_ENDPOINT=https://... asks another host for the weights.
SIZE ?= gpt2
JUDGE ?=
REAL = $(OUT)/real/$(SIZE)
SPAM = --data sms_spam --balance --init gpt2 --context_length 120 --batch_size 8 --epochs 5 --weight_decay 0.1 \
	--schedule constant --warmup_steps 0 --clip 0 --eval_every 130 --seed 123
PAIRS = --data preferences --lora_rank 16

real: $(REAL)/report.html ## the same on real data and GPT-2's weights: downloads, wants a GPU; SIZE=gpt2-medium

# Without weights it ends here. gpt2: losses 3.7547 and 3.5596 on the two parts of The Verdict, and a known sentence.
$(REAL)/%.checked: | $(VENV)
	$(PYTHON) gpt2_weights.py get --model $*
	$(PYTHON) data.py get verdict
	$(PYTHON) gpt2_weights.py check --model $*
	mkdir -p $(REAL) && touch $@

$(REAL)/data.here: $(REAL)/$(SIZE).checked $(REAL)/gpt2.checked
	$(PYTHON) data.py get sms_spam
	$(PYTHON) data.py get instructions
	$(PYTHON) data.py get preferences
	touch $@

# 124M from random weights on The Verdict, 10 epochs (untied in the book): training loss 0.57, best validation loss 6.12.
$(REAL)/pretrain/summary.json: $(REAL)/data.here
	$(PYTHON) train.py train --out_dir $(REAL)/pretrain --data verdict --tokenizer gpt2 --model gpt2 --context_length 256 --batch_size 2 --drop_rate 0.1 --epochs 10 --max_steps 0 --optimizer adamw --learning_rate 4e-4 --schedule constant --warmup_steps 0 --clip 0 --eval_every 5 --prompt "Every effort moves you" --seed 123 $(AGAIN)

# Last block, norm and head: 97.2 / 97.3 / 95.7% right in training, validation and test.
$(REAL)/cls/summary.json: $(REAL)/data.here
	$(PYTHON) finetune_cls.py train --out_dir $(REAL)/cls $(SPAM) --train_layers last-block --pooling position --learning_rate 5e-5 $(AGAIN)

# All weights: 96.7% of the test; adapters of rank 16: 96.7%, with 2.7 million trainable numbers.
$(REAL)/full/summary.json: $(REAL)/data.here
	$(PYTHON) finetune_cls.py train --out_dir $(REAL)/full $(SPAM) --pooling position --learning_rate 5e-5 $(AGAIN)

$(REAL)/lora/summary.json: $(REAL)/full/summary.json
	$(PYTHON) finetune_cls.py train --out_dir $(REAL)/lora $(SPAM) --pooling position --lora_rank 16 --lora_alpha 16 --learning_rate 8e-4 $(AGAIN)

# gpt2-medium: losses 3.826 / 3.762 (training / validation) fall to 0.299 / 0.657 after two epochs.
$(REAL)/sft/summary.json: $(REAL)/data.here
	$(PYTHON) finetune_sft.py train --out_dir $(REAL)/sft --data instructions --init $(SIZE) --no-mask_prompt --batch_size 8 --epochs 2 --learning_rate 5e-5 --schedule constant --warmup_steps 0 --clip 0 --eval_every 25 --seed 123 $(AGAIN)

# gpt2-medium: llama3 grades its answers near 50 of 100 (47.7 to 51.8 in the book's variants).
$(REAL)/sft/scores$(if $(JUDGE),.judged).txt: $(REAL)/sft/summary.json
	$(PYTHON) finetune_sft.py evaluate --data instructions --checkpoint $(REAL)/sft/model.safetensors $(if $(JUDGE),--judge $(JUDGE) )> $@.tmp
	mv $@.tmp $@ && cat $@

# Nothing is published for reward model and PPO on these pairs.
$(REAL)/reward/summary.json: $(REAL)/sft/summary.json
	$(PYTHON) rlhf.py reward --out_dir $(REAL)/reward --init $(REAL)/sft/model.safetensors $(PAIRS) --batch_size 8 $(AGAIN)

$(REAL)/ppo/summary.json: $(REAL)/reward/summary.json
	$(PYTHON) rlhf.py ppo --out_dir $(REAL)/ppo --init $(REAL)/sft/model.safetensors --reward $(REAL)/reward/model.safetensors $(PAIRS) --response_length 128 $(AGAIN)

# The loss starts at ln 2 = 0.693; gpt2-medium with log-probs averaged over the tokens: 0.610; here they are summed.
$(REAL)/dpo/summary.json: $(REAL)/reward/summary.json
	$(PYTHON) rlhf.py dpo --out_dir $(REAL)/dpo --init $(REAL)/sft/model.safetensors --reward $(REAL)/reward/model.safetensors $(PAIRS) --batch_size 8 --learning_rate 5e-5 --response_length 128 $(AGAIN)

$(REAL)/ppo/evaluation.json: $(REAL)/ppo/summary.json $(REAL)/dpo/summary.json
	$(PYTHON) rlhf.py evaluate --checkpoint $(REAL)/ppo/model.safetensors,$(REAL)/dpo/model.safetensors --init $(REAL)/sft/model.safetensors --reward $(REAL)/reward/model.safetensors --data preferences --response_length 128

$(REAL)/report.html: $(REAL)/pretrain/summary.json $(REAL)/cls/summary.json $(REAL)/lora/summary.json $(REAL)/sft/scores$(if $(JUDGE),.judged).txt $(REAL)/ppo/evaluation.json
	$(PYTHON) train.py report --out_dir $(REAL)

# Characters at nanoGPT's size for a CPU: its validation loss after 2,000 steps is 1.88; here 600 steps with Muon.
shakespeare: $(OUT)/shakespeare/verse.txt ## tiny Shakespeare by characters, and a page of its verse: 1.5 min
$(OUT)/shakespeare/summary.json: | $(VENV)
	$(PYTHON) train.py train --out_dir $(OUT)/shakespeare --data shakespeare --tokenizer char --context_length 64 --batch_size 12 --max_steps 600 --warmup_steps 60 --schedule linear --final_rate 0 --eval_every 300 --prompt "ROMEO:" $(AGAIN) $(ARGS)

$(OUT)/shakespeare/verse.txt: $(OUT)/shakespeare/summary.json
	$(PYTHON) gpt.py generate --checkpoint $(OUT)/shakespeare/model.safetensors --prompt "ROMEO:" --max_new_tokens 1200 > $@.tmp
	mv $@.tmp $@ && cat $@

# TinyStories (22 MB of it), byte pairs and a model of our own, 6 layers x 256: 2.6 CPU seconds a step. Not run here on
# the real file, and the minutes are computed. On a GPU, all of it, also not run:
# make stories STORIES=tinystories_full ARGS="--batch_size 128 --max_steps 10000"
STORIES ?= tinystories
stories: $(OUT)/stories/sample.txt ## a model of your own on real stories: downloads 22 MB, 35 min
$(OUT)/stories/tokenizer/tokenizer.json: | $(VENV)
	$(PYTHON) tokenizer.py train --data tinystories --vocab_size 4096 --out_dir $(OUT)/stories/tokenizer $(AGAIN)

$(OUT)/stories/summary.json: $(OUT)/stories/tokenizer/tokenizer.json
	$(PYTHON) train.py train --out_dir $(OUT)/stories --data $(STORIES) --tokenizer $(OUT)/stories/tokenizer/tokenizer.json --n_layers 6 --emb_dim 256 --n_heads 8 --context_length 256 --batch_size 8 --max_steps 1200 --warmup_steps 100 --learning_rate 6e-3 --eval_every 600 --prompt "Once upon a time" $(AGAIN) $(ARGS)

$(OUT)/stories/sample.txt: $(OUT)/stories/summary.json
	$(PYTHON) gpt.py generate --checkpoint $(OUT)/stories/model.safetensors --prompt "Once upon a time" --num_samples 3 --max_new_tokens 200 > $@.tmp
	mv $@.tmp $@ && cat $@

test: $(VENV) ## the quick tests, offline: 4 min
	$(PYTHON) -m pytest -q -m "not slow and not peer and not gpu" $(ARGS)

test-all: $(VENV) ## all tests that need no GPU and no other library: 10 min
	$(PYTHON) -m pytest -q -m "not peer and not gpu" $(ARGS)

test-peers: $(VENV) ## install requirements-peers.txt and compare with those packages: 5 min
	$(PYTHON) -m pip install --quiet -r requirements-peers.txt
	$(PYTHON) -m pytest -q -m peer $(ARGS)

bench: $(VENV) ## time and memory beside other projects that are here: 20 min, nothing else running
	$(PYTHON) tests/bench.py $(ARGS)

test-gpu: $(VENV) ## the tests that need a GPU; they skip without one
	$(PYTHON) -m pytest -q -m gpu $(ARGS)

bench-gpu: $(VENV) ## the same on a GPU: 8 min
	$(PYTHON) tests/bench.py --gpu $(ARGS)

clean: ## remove out/ and data/prepared/, keep downloads and .venv: 1 s
	rm -rf $(OUT) data/prepared
