#!/usr/bin/env bash
# From nothing to a fine-tuned, exported and evaluated MALoRA adapter, on two processes of this machine:
#
#   bash launch/quickstart.sh                                    six small tasks on a small Llama made here
#   bash launch/quickstart.sh --hf-model DIR --data FILE...      your Hugging Face model, one .json/.jsonl file per task
#
# Config keys may follow after --, for example: -- train_iters=50 lr=1e-3
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

absolute() { echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; }

hf_model="" files=() overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --hf-model)
      [ -f "${2:-}/config.json" ] || fail "--hf-model '${2:-}': is not a Hugging Face model (no config.json); name its directory"
      hf_model=$(absolute "$2")
      shift 2
      ;;
    --data)
      shift
      while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
        [ -f "$1" ] || fail "--data '$1': no such file; name .json or .jsonl files"
        files+=("$(absolute "$1")")
        shift
      done
      ;;
    --)
      shift
      overrides=("$@")
      break
      ;;
    *)
      sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      [ "$1" = --help ] || [ "$1" = -h ] || fail "'$1' is not an option of the quickstart"
      exit
      ;;
  esac
done
[ -z "$hf_model" ] || [ ${#files[@]} -gt 0 ] || fail "--hf-model needs --data FILE... too"
[ -n "$hf_model" ] || [ ${#files[@]} -eq 0 ] || fail "--data needs --hf-model DIR too"

setup_env
export OMP_NUM_THREADS=1 # one core per process: more threads than idle cores slow small models down

if [ -n "$hf_model" ]; then
  out=runs/quickstart_own
  for input in "$hf_model" "${files[@]}"; do
    [ "${input#"$ROOT/$out/"}" = "$input" ] || fail "'$input' lies in $out, which this run clears; move it elsewhere"
  done
  rm -rf $out
  step "1/6 splitting your data into training and validation records"
  python tools/make_quickstart.py --out $out --data "${files[@]}"
  tasks=$(cd $out/data/train && ls -- *.jsonl)
  tasks=$(sed "s/'/''/g; s|.*|{path: '$out/data/train/&', validation_path: '$out/data/validation/&'}|" <<<"$tasks" | paste -sd, -)
  # A pretrained model of any size: small steps and the usual learning rate instead of the tiny base's.
  overrides=("data=[$tasks]" "pretrained_checkpoint=$out/base_megatron" "save=$out/adapter" seq_length=512
    train_iters=100 micro_batch_size=2 global_batch_size=8 lr=5e-4 lr_warmup_iters=0 eval_interval=50 ${overrides[@]+"${overrides[@]}"})
  evaluation=(--batch-size 16)
else
  out=runs/quickstart
  hf_model=$out/base
  rm -rf $out/data $out/adapter $out/adapter_hf
  step "1/6 making the tasks and a small Llama, which takes about a minute"
  python tools/make_quickstart.py --out $out
  evaluation=(--batch-size 50 --max-new-tokens 16)
fi

step "2/6 converting the base from Hugging Face to megatron-core"
python tools/convert_hf.py import --hf-model "$hf_model" --megatron-path $out/base_megatron

step "3/6 fine-tuning with MALoRA on two processes, each holding half of the experts"
python -m torch.distributed.run --standalone --nproc-per-node 2 -m malora_dist.train \
  --config configs/quickstart.yaml ${overrides[@]+"${overrides[@]}"}

step "4/6 exporting the adapter in PEFT's format"
python tools/convert_hf.py export-adapter --megatron-path $out/adapter --hf-path $out/adapter_hf --hf-model "$hf_model"

step "5/6 reloading it in transformers: answers to the validation files, before and after"
python tools/evaluate.py --hf-model "$hf_model" --adapter $out/adapter_hf --compare --json $out/scores.json \
  --data $out/data/validation/*.jsonl "${evaluation[@]}"

step "6/6 done"
echo "scores                 $out/scores.json"
echo "adapter, megatron      $out/adapter"
echo "adapter, PEFT          $out/adapter_hf"
echo "base, Hugging Face     $hf_model"
echo "curves                 .venv/bin/tensorboard --logdir $out/adapter/tensorboard"
echo "                       and then http://localhost:6006/#custom_scalars"
echo "what the experts do    .venv/bin/python tools/inspect_adapter.py $out/adapter_hf --hf-model $hf_model --data $out/data/validation/*.jsonl"
