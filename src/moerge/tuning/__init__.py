"""Fine-tuning and distilling a merged model: data mixture, losses, teachers, and transformers' Trainer."""
