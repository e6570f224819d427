"""Score a Hugging Face model, with or without an adapter: python tools/evaluate.py --help."""

from malora_dist.hf.evaluate import main

if __name__ == "__main__":
    main()
