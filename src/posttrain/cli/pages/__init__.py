"""What `posttrain ui` shows: pages over the records of one folder, and acts that are command lines."""
