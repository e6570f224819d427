#!/usr/bin/env bash
# What only a GPU shows, in one go, with a record of it:  bash launch/gpu_check.sh
#
# 1. the one-process rows of tests/test_parity.py on the GPU against the oracle on the CPU, and tests/test_gpu.py (which
#    compares fmoe with the local exchange where fmoe has been built);
# 2. a training run of a random Llama of the shape of Llama-3.2-1B in bfloat16, experts on every GPU of this machine;
# 3. the step time of every method on layers of Llama-2-7B and Llama-3-8B.
# Everything lies in runs/gpu_check afterwards; versions.txt, train.log and step_time*.json are what to report.
#
# DEVICE=cpu LAYERS=1 TRAIN_ITERS=2 rehearses it without a GPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
device=${DEVICE:-cuda} layers=${LAYERS:-16} iterations=${TRAIN_ITERS:-20} out=runs/gpu_check
[ "$device" = cpu ] || nvidia-smi >/dev/null 2>&1 || fail "no GPU here (nvidia-smi fails); DEVICE=cpu LAYERS=1 rehearses the script"
setup_env
mkdir -p $out

step "1/5 versions"
{
  date -u +%F
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no GPU"
  python -m pip list --format=freeze | grep -iE '^(torch|megatron-core|transformers|fastmoe|apex|transformer.engine|nvidia-nccl)' || true
} | tee $out/versions.txt

step "2/5 tests on $device"
MALORA_TEST_DEVICE=$device python -m pytest -q tests/test_gpu.py tests/test_parity.py -k "gpu or (1 and process)"

step "3/5 a random Llama of the shape of Llama-3.2-1B with $layers layers, and tasks"
python tools/make_quickstart.py --out $out/quickstart
python - "$out" "$layers" <<'PYTHON'
import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

out, layers = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(f"{out}/quickstart/base")
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
))
model.save_pretrained(f"{out}/llama")
tokenizer.save_pretrained(f"{out}/llama")
PYTHON
python tools/convert_hf.py import --hf-model $out/llama --megatron-path $out/base

step "4/5 training it in bfloat16"
processes=$([ "$device" = cpu ] && echo 2 || nvidia-smi --list-gpus | wc -l)
tasks=$(cd $out/quickstart/data/train && ls -- *.jsonl | sed "s|.*|{path: $out/quickstart/data/train/&}|" | paste -sd, -)
python -m torch.distributed.run --standalone --nproc-per-node "$processes" -m malora_dist.train \
  pretrained_checkpoint=$out/base "data=[$tasks]" bf16=true device="$device" packing=true seq_length=1024 \
  micro_batch_size=1 global_batch_size=64 train_iters="$iterations" eval_iters=0 log_interval=1 lr=1e-3 \
  num_lora_experts=8 expert_model_parallel_size="$([ $((8 % processes)) = 0 ] && echo "$processes" || echo 1)" 2>&1 | tee $out/train.log

step "5/5 step time by method"
if [ "$device" = cpu ]; then
  python tools/benchmarks/step_time.py --hidden 256 --tokens 512 --rounds 2 --no-memory --output $out/step_time.json
else
  for shape in llama2-7b llama3-8b; do
    python tools/benchmarks/step_time.py --device cuda --bf16 --shape $shape --layers 2 --tokens 8192 --rounds 10 \
      --output $out/step_time_$shape.json
  done
fi
