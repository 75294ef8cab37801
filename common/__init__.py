"""What no lesson teaches and no part changes: the scaffolding around the engines."""
