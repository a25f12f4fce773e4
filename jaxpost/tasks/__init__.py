"""What answers are worth: functions that score them, called in processes of their own."""
